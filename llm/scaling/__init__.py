"""Scaling laws: ladders of models trained at matched FLOPs, and fits of what their valid bounds say."""
