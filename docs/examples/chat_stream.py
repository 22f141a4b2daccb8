"""Needs the openai package. A chat with OpenAI's own client, printed while the model writes it.

    python docs/examples/chat_stream.py [URL]

With a seed the same question has the same answer, on CPUs whoever else is served at the time.
"""

import sys

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{URL}/v1", api_key="none")  # a server that has keys wants one of them here
model = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=model,
    messages=[
        {"role": "system", "content": "Answer in a few sentences."},
        {"role": "user", "content": "Who is Mina?"},
    ],
    max_tokens=120,
    temperature=0.7,
    seed=3,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f"\n\n{model}: {chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} out")
