"""Other engines, one file each: how its form of a checkpoint is made, and how it answers requests.

Each runs with the interpreter of an environment of its own; worker.py says what requests are.
"""
