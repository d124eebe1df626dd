"""Every model class of transformers, built tiny and put through the same checks: python -m every_model."""
