"""`make bench-gpu`: on a machine with a GPU its tests, then its benchmarks, in one command."""
