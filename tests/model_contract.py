"""What every architecture promises, as checks that take its word.

    @pytest.mark.parametrize("check", CHECKS)
    @pytest.mark.parametrize("arch", arch_names())
    def test_contract(arch, check): check(arch)
"""
import torch

from microjulia.gpt import build_model, capture, config_for, find_model

TOLERANCE = dict(rtol=1e-4, atol=1e-4)


def make(arch, seed=0, **changes):
    "The first size of `arch` in eval mode, its weights shaken so that every part of it matters."
    torch.manual_seed(seed)
    cls = find_model(arch)
    model = cls(config_for(arch, next(iter(cls.sizes)), **changes)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.05 * torch.randn_like(p))
    return model


def some_ids(model, B=2, T=None, seed=1):
    "Random ids for `model`, by default a full block."
    V, block_size = model.config.vocab_size, model.config.block_size
    return torch.randint(V, (B, T or block_size), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def check_shapes(arch):
    model = make(arch)
    for B, T in ((1, 1), (3, 5), (2, model.config.block_size)):
        logits = model(some_ids(model, B, T))
        assert logits.shape == (B, T, model.config.vocab_size) and logits.isfinite().all()


@torch.no_grad()
def check_causality(arch):
    "Changing a token changes no earlier logit, and does change its own."
    model = make(arch)
    ids, T = some_ids(model), model.config.block_size
    before = model(ids)
    for t in (1, T // 3, T - 1):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % model.config.vocab_size
        after = model(other)
        torch.testing.assert_close(after[:, :t], before[:, :t], **TOLERANCE)
        assert (after[:, t] - before[:, t]).abs().amax() > 1e-2


@torch.no_grad()
def check_shorter_text(arch):
    "A text's logits do not depend on what follows, nor on how long it is."
    model = make(arch)
    ids = some_ids(model)
    full = model(ids)
    for T in (1, 7, model.config.block_size // 2):
        torch.testing.assert_close(model(ids[:, :T]), full[:, :T], **TOLERANCE)


@torch.no_grad()
def check_rows_apart(arch):
    "A row's logits do not depend on the other rows."
    model = make(arch)
    ids = some_ids(model, B=3)
    together = model(ids)
    for i in range(3): torch.testing.assert_close(model(ids[i:i + 1])[0], together[i], **TOLERANCE)


@torch.no_grad()
def check_cache(arch):
    "Prefill plus single steps, in any portions and up to the end of the block, is the full pass."
    model = make(arch)
    ids, T = some_ids(model), model.config.block_size
    full = model(ids)
    for portions in ([T], [1] * T, [T // 2] + [1] * (T - T // 2), [5, 3, T - 9, 1]):
        cache, parts, at = model.new_cache(batch_size=2), [], 0
        for n in portions:
            parts.append(model(ids[:, at:at + n], cache))
            at += n
            assert cache.length == at
        torch.testing.assert_close(torch.cat(parts, 1), full, **TOLERANCE)


@torch.no_grad()
def check_cache_again(arch):
    "A cache that was reset, or cropped, goes on as a new one would."
    model = make(arch)
    a, b = some_ids(model, T=9, seed=1), some_ids(model, T=9, seed=2)
    cache = model.new_cache(2)
    model(a, cache)
    cache.reset()
    torch.testing.assert_close(model(b, cache), model(b), **TOLERANCE)
    cache.crop(4)
    mixed = torch.cat([b[:, :4], a[:, 4:]], 1)
    torch.testing.assert_close(model(a[:, 4:], cache), model(mixed)[:, 4:], **TOLERANCE)


@torch.no_grad()
def check_capture(arch):
    "Looking inside changes no logit, and the last of the residual stream leads to them."
    model = make(arch)
    ids = some_ids(model, T=11)
    plain = model(ids)
    with capture(model) as seen: looked = model(ids)
    torch.testing.assert_close(looked, plain, **TOLERANCE)
    assert seen.residual.shape[1:3] == (2, 11) and all(m.observe is None for m in model.modules() if hasattr(m, "observe"))


def check_too_long(arch):
    model = make(arch)
    cache, full = model.new_cache(1), some_ids(model, B=1)
    for use in (lambda: model(torch.cat([full, full[:, :1]], 1)), lambda: model(full[:, :1], cache)):
        if cache.length == 0:
            with torch.no_grad(): model(full, cache)
        try: use()
        except ValueError as e: assert "block_size" in str(e)
        else: raise AssertionError("more tokens than block_size were taken")


def check_rebuilt(arch):
    "A model is its config and its state dict."
    model = make(arch)
    again = build_model(arch, model.config.to_dict()).eval()
    again.load_state_dict(model.state_dict())
    ids = some_ids(model, T=6)
    assert torch.equal(again(ids), model(ids)) and type(model).arch == arch == model.config.arch
    assert model.num_params() == sum(p.numel() for p in set(model.parameters()))


def check_gradients(arch):
    "The loss at the start is near that of guessing, and a step reaches every parameter."
    torch.manual_seed(0)
    cls = find_model(arch)
    model = cls(config_for(arch, next(iter(cls.sizes))))
    ids = some_ids(model, B=4)
    loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())
    loss.backward()
    assert abs(loss.item() - torch.tensor(float(model.config.vocab_size)).log()) < 0.3
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing, missing


CHECKS = [check_shapes, check_causality, check_shorter_text, check_rows_apart, check_cache, check_cache_again,
          check_capture, check_too_long, check_rebuilt, check_gradients]
