"""The HTTP face of the serving engine: OpenAI's protocol, adapters by name, keys, limits."""
