"""Merging inside models: the wrapped ViT, vision tower and LLaVA, what they cost, and the models that ship.

Only here are a model's internals touched. Data sets, measurements and searches: not here.
"""
