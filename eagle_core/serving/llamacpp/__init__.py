"""llama.cpp: where it is, its files of weights, and its server."""
