"""int4q's algorithms on one model: perplexity, KL and time of each.

python compare.py build/model build/text
"""

from bench import Bench, arguments, finish, quantized

if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    bench = Bench(given.model, given.texts, given.device, given.rows)
    for group in given.groups:
        bench.measure("min-max", group, quantized("tinygemm", group, None))
        bench.measure("hqq", group, quantized("hqq", group, None))
        bench.measure("search", group, quantized("search", group, None))
        bench.measure("auto, random ids", group, quantized("search", group, bench.random))
        bench.measure("search, text", group, quantized("search", group, bench.text))
        bench.measure("gptq, text", group, quantized("gptq", group, bench.text))
    finish(bench, given.json)
