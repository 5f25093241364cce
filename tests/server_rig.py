"What the tests of the server and of its page share: a small engine, one that stands still, a server around them."
import asyncio
import threading
from contextlib import contextmanager

import torch

from microjulia.generation import Event
from microjulia.gpt import GPT, GPTConfig
from microjulia.serving.answers import Served, Service
from microjulia.serving.engine import Engine, EngineClosed, QueueFull
from microjulia.serving.protocol import Limits
from microjulia.serving.server import Background
from microjulia.tokenizer import CharTokenizer

tok = CharTokenizer()
LIMITS = Limits(body_bytes=20_000, header_seconds=1, body_seconds=1, write_seconds=1, drain_seconds=.3)
WAIT = 20  # seconds in which a thing that takes milliseconds must happen


def engine(seed=0, alphabet=None, **options):
    torch.manual_seed(seed)
    tokenizer = CharTokenizer(alphabet) if alphabet else tok
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=32)).eval()
    return Engine(model, tokenizer, **options)


@contextmanager
def server(*models, limits=LIMITS, **options):
    "A server for the length of a test: its service, with `url`."
    service = Service([Served(*m) for m in models], limits, **options)
    background = Background(service)
    service.url, service.background = background.url, background
    try: yield service
    finally: background.stop()


class Held:
    "A handle whose text stands still after its first characters."
    def __init__(self, puppet): self.puppet, self.left, self.over = puppet, list(puppet.text), None
    def __aiter__(self): return self
    async def __anext__(self):
        if self.left: return self.event(self.left.pop(0))
        self.over = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.puppet.waiting.set()
        await self.over.wait()
        raise EngineClosed("closed")
    def event(self, c): return Event(c, int(tok.encode(c)[0]), -1.0)
    def ready(self):
        at_hand, self.left = self.left, []
        return [self.event(c) for c in at_hand]
    def cancel(self):
        if self in self.puppet.handles: self.puppet.handles.remove(self)
        if not self.puppet.handles: self.puppet.empty.set()


class Puppet:
    "An engine that holds its texts, with room for so many."
    tokenizer, block_size = tok, 32
    def __init__(self, text="", room=99):
        self.text, self.room, self.handles = text, room, []
        self.waiting, self.empty = threading.Event(), threading.Event()
    def stream(self, ids, params):
        if len(self.handles) >= self.room: raise QueueFull("no room")
        self.handles.append(Held(self))
        return self.handles[-1]
    def close(self):
        for h in list(self.handles): h.over and h.loop.call_soon_threadsafe(h.over.set)
