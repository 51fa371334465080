"""Searches on any server of OpenAI's protocol that can continue a message and stop at a string. No torch."""
