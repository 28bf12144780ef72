"""What penalties do to robust accuracy: digits ViTs trained with each, attacked, and measured."""
