"""An LLM judge behind an OpenAI-compatible server: how good is the answer, from 0 to 9?

`reward.environment` gives it the server's address, JUDGE_URL (http://127.0.0.1:8000/v1), its key, JUDGE_KEY, and the
name of the model there, JUDGE_MODEL. The function is `async`, so each worker asks about several answers at a time.
"""

from __future__ import annotations

import os
import re

import httpx

from megatron_chord.rewards.response import Response

PROMPT = "{question}\n{answer}\nHow good is this answer? Reply with one digit, 0 to 9:"

client = httpx.AsyncClient(
    base_url=os.environ["JUDGE_URL"],
    headers={"Authorization": f"Bearer {os.environ['JUDGE_KEY']}"},
    timeout=240,
    trust_env=False,  # the server is on this machine or in this cluster: no proxy
)


async def judge(response: Response) -> float:
    """From 0 to 1. If the server's answer cannot be read, this raises, and the grading counts as an error."""
    text = PROMPT.format(question=response.messages[-1]["content"], answer=response.text)
    reply = await client.post(
        "chat/completions",
        json={
            "model": os.environ["JUDGE_MODEL"],
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 16,
        },
    )
    reply.raise_for_status()
    said = reply.json()["choices"][0]["message"]["content"]
    grade = re.search(r"[0-9]", said)
    if grade is None:
        raise ValueError(f"the judge gave no grade: {said!r:.200}")
    return int(grade[0]) / 9
