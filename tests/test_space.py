"The files of a Space, read as those read them for whom they are made; nothing is built."
import json
import re
import shlex

import pytest
import torch
import yaml

from microjulia.api import shipped_model
from microjulia.checkpoint import load_checkpoint, save_checkpoint
from microjulia.cli import build_parser, main
from microjulia.gpt import GPT, GPTConfig
from microjulia.serving.space import make_space
from microjulia.tokenizer import CharTokenizer

TITLE = 'The "cave": {shadows}\nand #light'


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    torch.manual_seed(0)
    save_checkpoint(folder / "plato", GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=32)), CharTokenizer(), step=3)
    make_space(folder / "cave", folder / "plato", TITLE)
    return folder / "cave"


def dockerfile(space):
    "The instructions of the Dockerfile with their arguments, lines joined."
    lines = (space / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def test_hugging_face_finds_its_front_matter(space):
    card = pytest.importorskip("huggingface_hub").SpaceCard.load(space / "README.md").data
    assert (card.sdk, card.app_port, card.license, card.title) == ("docker", 7860, "mit", 'The "cave": {shadows} and #light')
    assert len(card.short_description) <= 60 and {card.colorFrom, card.colorTo} <= set("red yellow green blue indigo purple pink gray".split())


def test_the_image(space):
    found = dockerfile(space)
    names = [name for name, _ in found]
    assert set(names) <= {"FROM", "RUN", "USER", "ENV", "WORKDIR", "COPY", "EXPOSE", "HEALTHCHECK", "CMD"}
    assert names[0] == "FROM" and names.count("CMD") == names.count("USER") == 1 and ":latest" not in found[0][1]
    assert dict(found)["USER"] == "1000" and names.index("USER") < names.index("WORKDIR") < names.index("CMD")
    assert dict(found)["EXPOSE"] == "7860" and "/health" in dict(found)["HEALTHCHECK"] and dict(found)["CMD"].startswith("exec ")
    check = re.search(r'python -c\s+"(.*)"', dict(found)["HEALTHCHECK"])[1]
    compile(check, "HEALTHCHECK", "exec")
    assert (space / ".dockerignore").read_text().split() == ["*", "!model"] and "model model" in dict(found)["COPY"]


def test_the_command_of_the_image_is_one_of_ours(space):
    argv = shlex.split(dict(dockerfile(space))["CMD"].replace("${PORT:-7860}", "7860"))
    assert argv[:2] == ["exec", "microjulia"]
    options = vars(build_parser().parse_args(argv[2:]))
    assert (options["host"], options["port"], options["no_auth"], options["model"]) == ("0.0.0.0", 7860, True, ["microjulia=model"])


def test_compose(space):
    found = yaml.safe_load((space / "compose.yaml").read_text())
    server, proxy = found["services"]["server"], found["services"]["proxy"]
    assert "ports" not in server and server["read_only"] and found["networks"]["inside"]["internal"]
    assert proxy["depends_on"]["server"]["condition"] == "service_healthy" and "HEALTHCHECK" in dict(dockerfile(space))
    assert set(server["networks"]) | set(proxy["networks"]) == set(found["networks"])
    caddy = (space / "Caddyfile").read_text()
    assert caddy.count("{\n") == caddy.count("}\n") and "reverse_proxy server:7860" in caddy and "flush_interval -1" in caddy
    assert proxy["volumes"][0].startswith("./Caddyfile:")


def test_the_model_is_packed_without_its_training(space):
    assert load_checkpoint(space / "model").step == 3 and not (space / "model" / "training_state").exists()
    assert json.loads((space / "model" / "config.json").read_text())


def test_the_verb(space, tmp_path, capsys):
    assert main(["space", str(tmp_path / "s"), "--model", str(space / "model")]) == 0
    assert str(tmp_path / "s" / "Dockerfile") in capsys.readouterr().out.split()
    for argv, said in (["s", "--model", str(space / "model")], "not empty"), (["t", "--model", "nowhere"], "nowhere"):
        assert main(["space", str(tmp_path / argv[0]), *argv[1:]]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert main(["space", str(tmp_path / "shipped")]) == 0
    assert load_checkpoint(tmp_path / "shipped" / "model").model.num_params() == load_checkpoint(shipped_model()).model.num_params()
