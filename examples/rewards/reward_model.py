"""A reward model behind HTTP. `reward.batch_size` is set, so the function gets a list of responses.

REWARD_MODEL_URL is the address of `reward_model_server.py`, or of anything else that answers {"texts": [...]} with
{"scores": [...]}.
"""

from __future__ import annotations

import os

import httpx

from megatron_chord.rewards.response import Response

client = httpx.Client(timeout=240, trust_env=False)


def reward_model(responses: list[Response]) -> list[float]:
    texts = [f"{response.messages[-1]['content']}\n{response.text}" for response in responses]
    reply = client.post(os.environ["REWARD_MODEL_URL"], json={"texts": texts})
    reply.raise_for_status()
    return reply.json()["scores"]
