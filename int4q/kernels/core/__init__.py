"""The C++ core, on torch's stable ABI: ops and launches that need no Python. Optional."""
