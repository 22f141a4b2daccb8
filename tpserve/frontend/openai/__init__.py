"""The OpenAI API: request bodies to engine requests, and outputs to responses and streams."""
