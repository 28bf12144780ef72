"""Attacks on classifiers: of images, of tokens, and the smallest perturbation that changes the class."""
