"""Lamella: pretraining of layer stacks beyond the Transformer, under layouts that never change the model."""
