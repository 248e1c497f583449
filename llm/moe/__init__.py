"""Fewer experts for sparse mixture-of-experts models, without training: HC-SMoE and what it is compared with."""
