"""How is a search served over HTTP? An app in OpenAI's protocol, and what guards it."""
