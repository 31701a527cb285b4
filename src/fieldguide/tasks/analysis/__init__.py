"""Analyses of a trained model for the report: what its predictions depend on, for whom they are good, how fast they are.

They use the model through functions from examples to outputs, so that they know neither architectures nor tasks.
"""
