"""English text from Debian's documentation packages, as token ids: what train.py learns.

    python text.py build/text    # needs apt-get, dpkg-deb and the tokenizers package

Writes ``tokenizer.json`` (byte-level BPE, made from the training text) and uint16 arrays:
``train.npy`` ``[tokens]``, ``calibration.npy`` and ``heldout.npy`` ``[n, 512]``, of other files.
"""

import argparse
import gzip
import hashlib
import html
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PACKAGES = (
    "anarchism", "debian-faq", "debian-handbook", "debian-policy", "developers-reference",
    "dict-gcide", "linux-doc-6.1", "maint-guide", "perl-doc", "postgresql-doc-15",
    "python3.11-doc",
)  # fmt: skip
OTHER_PARTS = {1: "heldout", 2: "calibration"}  # number of a file modulo 40
ROW = 512
LARGEST = 12_000_000  # characters of a package
OTHER_LANGUAGES = re.compile(
    r"/translations/|debian-handbook/html/(?!en-US)|\.(?!en\.)[a-z]{2}\.(html|txt)"
)


def read(path: Path) -> str:
    """Paragraphs of a file: lines without markup that are long enough to be prose or code."""
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix in (".gz", ".dz") else data
    text = data.decode("utf-8", errors="ignore")
    if "<html" in text[:2000].lower():
        text = re.sub(r"(?is)<(script|style|head|nav|footer).*?</\1>", " ", text)
        text = html.unescape(re.sub(r"(?s)<[^>]+>", " ", text))
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if len(line) >= 40)


def documents(package: str, folder: Path) -> list[str]:
    """Texts of the files of a package, always in the same order."""
    subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
    (archive,) = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, folder / package], check=True)
    endings = ("*.html", "*.txt", "*.txt.gz", "*.pod", "*.rst", "*.rst.gz", "*.dict.dz")
    paths = sorted({p for e in endings for p in (folder / package).rglob(e) if p.is_file()})
    paths.sort(key=lambda p: hashlib.sha256(p.name.encode()).digest())  # any topic, anywhere
    texts, size = [], 0
    for path in paths:
        if not OTHER_LANGUAGES.search(str(path)) and len(text := read(path)) > 4000:
            texts.append(text[:LARGEST])
            size += len(text)
        if size > LARGEST:
            break
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", nargs="+", default=PACKAGES)
    parser.add_argument("--vocabulary", type=int, default=16384)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"heldout": [], "calibration": [], "train": []}
    with tempfile.TemporaryDirectory() as folder:
        for package in arguments.packages:
            texts = documents(package, Path(folder))
            for i, text in enumerate(texts):
                parts[OTHER_PARTS.get(i % 40, "train")].append(text)
            size = sum(map(len, texts)) / 1e6
            print(f"{package}: {len(texts)} files, {size:.1f} million characters")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        parts["train"],
        trainers.BpeTrainer(
            vocab_size=arguments.vocabulary,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    end = tokenizer.token_to_id("<|end|>")
    for part, texts in parts.items():
        ids = [np.array([*e.ids, end], np.uint16) for e in tokenizer.encode_batch(texts)]
        if part != "train":  # a few rows of each file
            ids = [t[: len(t) // ROW * ROW][: 2 * ROW].reshape(-1, ROW) for t in ids]
        np.save(arguments.out / f"{part}.npy", rows := np.concatenate(ids))
        print(part, rows.shape)


if __name__ == "__main__":
    main()
