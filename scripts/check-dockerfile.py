#!/usr/bin/env python3
"""Checks packaging/Dockerfile with hadolint, which parses it and the shell in it, and that it keeps what it promises; and that the
compose files beside it name services, variables and engines that there are. The manifests of Kubernetes beside them
are held against its schemas by kubernetes-validate.

Nothing is built: that takes a container engine. `.ci/run` builds the programs, and this checks that the variables are those of
nkv-server.

hadolint and kubernetes-validate are in the venv of check-openapi.py. Without a package registry this says so and passes, except in CI (CI=true).
"""

import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "http"))
import door  # noqa: E402

DOCKERFILE = door.ROOT / "packaging/Dockerfile"
MANIFESTS = sorted(DOCKERFILE.parent.glob("kubernetes-*.yaml"))
SOURCES = sorted((door.ROOT / "crates/nkv-server/src/bin/nkv-server").glob("*.rs"))


def promises(text, variables):
    last = text.rsplit("\nFROM ", 1)[1]
    for instruction in ("VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"):
        if not re.search(rf"^{instruction} ", last, re.M):
            yield f"the last stage has no {instruction}"
    user = re.search(r"^USER (\S+)", last, re.M)
    if not user or user[1] in ("root", "0"):
        yield "the last stage runs as root"
    if text.count("\nFROM ") < 2:
        yield "it is one stage, and so as large as what builds it"
    yield from (f"nkv-server has no {name}" for name in re.findall(r"\b(NKV_\w+)=", last) if name not in variables)


def compose(variables):
    """What is wrong with the compose files; run by the venv's Python, which has yaml."""
    import yaml

    for file in sorted(DOCKERFILE.parent.glob("compose-*.yaml")):
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
        services, volumes = read["services"], read.get("volumes", {})
        for name, service in services.items():
            if ("image" in service) == ("build" in service):
                yield f"{file.name}: {name} has an image or a build"
            yield from (f"{file.name}: {name} waits for {other}" for other in service.get("depends_on", []) if other not in services)
            for mount in service.get("volumes", []):
                if mount.split(":")[0] not in volumes:
                    yield f"{file.name}: there is no volume of {mount}"
            environment = service.get("environment", {})
            yield from (f"{file.name}: nkv-server has no {key}" for key in environment if key.startswith("NKV_") and key not in variables)
            engine = re.match(r"(\w+)://(\w+):\d+/\w+$", environment.get("NKV_ENGINE", ""))
            if "build" in service and not (engine and engine[1] in file.name and engine[2] in services):
                yield f"{file.name}: {name} has no engine of this file"


def manifests(variables):
    """What the manifests set that nkv-server does not read."""
    for file in MANIFESTS:
        for name in re.findall(r"\bname: (NKV_\w+)", file.read_text(encoding="utf-8")):
            if name not in variables:
                yield f"{file.name}: nkv-server has no {name}"


def main():
    variables = [name for source in SOURCES for name in re.findall(r'env = "(\w+)"', source.read_text(encoding="utf-8"))]
    if "--compose" in sys.argv:
        wrong = list(compose(variables))
        print("\n".join(wrong) or "packaging/compose-*.yaml: as they should be")
        return 1 if wrong else 0
    wrong = [*promises(DOCKERFILE.read_text(encoding="utf-8"), variables), *manifests(variables)]
    print("\n".join(wrong) or "packaging/Dockerfile: as promised")
    programs = door.venv()
    # Base images without a digest: they are to bring their repairs along.
    lint = programs and subprocess.run([programs / "hadolint", "--ignore", "DL3006", DOCKERFILE])
    files = programs and subprocess.run([programs / "python", __file__, "--compose"])
    schemas = programs and subprocess.run([programs / "kubernetes-validate", "--strict", *MANIFESTS])
    return 1 if wrong or any(ran and ran.returncode for ran in (lint, files, schemas)) else 0


if __name__ == "__main__":
    sys.exit(main())
