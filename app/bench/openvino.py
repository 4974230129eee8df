"""OpenVINO GenAI: converted by optimum-intel in one environment, served from another."""

from pathlib import Path

from app.bench.environments import run_logged
from app.bench.peer import (
    CAPACITY_TOKENS,
    Environment,
    Launch,
    Model,
    Peer,
    PeerFault,
    Workplace,
    replace_folder,
)

_SERVER = Environment(name="openvino", requirements=("openvino-genai", "numpy"))
# The torch that this project pins: another would be downloaded, by default with CUDA.
_CONVERTER = Environment(
    name="optimum",
    requirements=("optimum-intel[openvino]", "torch==2.13.0", "gguf", "accelerate"),
    without=("torchvision",),
)


def openvino(bits: int) -> Peer:
    """Return the peer with weights of 8 bits (a scale a channel) or 4 (groups of 64 or 128)."""

    def prepare(model: Model, workplace: Workplace) -> Path:
        workplace.python_of(_SERVER)
        folder = workplace.cache / "models" / f"{model.name}-openvino-int{bits}"
        if folder.is_dir():
            return folder
        optimum = workplace.python_of(_CONVERTER).with_name("optimum-cli")
        flags = ["--task", "text-generation-with-past", "--weight-format", f"int{bits}"]
        flags += ["--group-size-fallback", "adjust"] if bits == 4 else []

        checkpoint = model.checkpoint or _unpacked(model, workplace)

        def convert(draft: Path) -> None:
            command = [str(optimum), "export", "openvino", "--model", str(checkpoint)]
            run_logged([*command, *flags, str(draft)], workplace.cache / "logs" / "optimum.log")

        return replace_folder(folder, convert)

    def command(launch: Launch, workplace: Workplace) -> list[str]:
        script = Path(__file__).with_name("openvino_server.py")
        python = workplace.python_of(_SERVER)  # -P: a file beside the script is named openvino too
        return [
            str(python),
            "-P",
            str(script),
            str(launch.model),
            str(launch.port),
            str(CAPACITY_TOKENS),
        ]

    return Peer(name=f"OpenVINO int{bits}", bits=bits, prepare=prepare, command=command)


_UNPACK = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, name, target = sys.argv[1:]
for kind in (AutoModelForCausalLM, AutoTokenizer):
    kind.from_pretrained(folder, gguf_file=name).save_pretrained(target)
"""


def _unpacked(model: Model, workplace: Workplace) -> Path:
    """Return the checkpoint of a GGUF file, which is quantised anew."""
    if model.gguf is None:
        raise PeerFault("the model has neither a GGUF file nor a checkpoint")
    folder = workplace.cache / "models" / f"{model.name}-unpacked"
    if folder.is_dir():
        return folder
    python, where = workplace.python_of(_CONVERTER), [str(model.gguf.parent), model.gguf.name]

    def unpack(draft: Path) -> None:
        log = workplace.cache / "logs" / "unpack.log"
        run_logged([str(python), "-c", _UNPACK, *where, str(draft)], log)

    return replace_folder(folder, unpack)


OPENVINO = (openvino(8), openvino(4))
