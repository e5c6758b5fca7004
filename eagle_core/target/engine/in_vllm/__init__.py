"""What runs in the Python that has vLLM: it imports vLLM, torch and NumPy, and nothing of Eyas.

Its modules are found by their own names, for this folder is on the path of that process.
"""
