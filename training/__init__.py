"""Command lines: each is a thin shell over clinvla_fast."""
