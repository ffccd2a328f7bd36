"""LightningModules: EDM, consistency distillation and consistency training. Thin: mathematics lives below."""
