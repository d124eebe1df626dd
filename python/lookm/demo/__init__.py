"""A small picture-reading task and a model trained on it, to see in a minute what a compressed cache still knows."""
