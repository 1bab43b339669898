"""The caption table. No other room reads it."""
