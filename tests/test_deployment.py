"""Tests of docs/deployment.md: its Kubernetes objects fit each other, and its sizes are serve-plan's."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import invoke
from pages import DOCS

FOLDER = DOCS / "deployment"
PAGE = (DOCS / "deployment.md").read_text(encoding="utf-8")


def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


ALL = objects("kubernetes.yaml")


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [one for one in ALL if one["kind"] == kind and one["metadata"]["name"] == name]
    return found


def container(name: str) -> dict[str, Any]:
    (found,) = named("Deployment", name)["spec"]["template"]["spec"]["containers"]
    return found


def test_deployment_objects_have_what_every_object_has():
    for one in [*ALL, *objects("load-adapter.yaml")]:
        assert one["apiVersion"] and one["kind"]
        assert one["metadata"].get("name") or one["metadata"]["generateName"]
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "steering"
    assert len({(one["kind"], one["metadata"]["name"]) for one in ALL}) == len(ALL)


def test_deployment_selectors_select_the_pods():
    labels = {one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"] for one in ALL
              if one["kind"] == "Deployment"}  # fmt: skip
    for one in ALL:
        name = one["metadata"]["name"]
        if one["kind"] in ("Deployment", "PodDisruptionBudget"):
            assert one["spec"]["selector"]["matchLabels"].items() <= labels[name].items()
        if one["kind"] == "Service":
            assert one["spec"]["selector"].items() <= labels[name].items()
            (port,) = one["spec"]["ports"]
            assert port["targetPort"] in {each["name"] for each in container(name)["ports"]}
    (routed,) = [arg for arg in container("router")["args"] if arg.startswith("--k8s-label-selector=")]
    assert dict([routed.partition("=")[2].split("=")]).items() <= labels["vllm"].items()
    target = named("ScaledObject", "vllm")["spec"]
    assert named(target["scaleTargetRef"]["kind"], target["scaleTargetRef"]["name"])
    assert target["minReplicaCount"] <= named("Deployment", "vllm")["spec"]["replicas"] <= target["maxReplicaCount"]


def test_deployment_volumes_are_there():
    pod = named("Deployment", "vllm")["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount for mount in container("vllm")["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    assert named("PersistentVolumeClaim", volumes["adapters"]["persistentVolumeClaim"]["claimName"])
    assert mounts["adapters"]["readOnly"]
    script = named("ConfigMap", volumes["start"]["configMap"]["name"])["data"]
    assert container("vllm")["command"][-1].rpartition("/")[2] in script
    environment = {one["name"]: one["value"] for one in container("vllm")["env"]}
    assert environment["FUSED_STEER_COPIES"] == mounts["copies"]["mountPath"]


def test_deployment_probes_and_ports_agree():
    for name in ("vllm", "router"):
        ports = {port["name"]: port["containerPort"] for port in container(name)["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container(name):
                assert container(name)[probe]["httpGet"]["port"] in ports
    start = named("ConfigMap", "start")["data"]["start.sh"]
    assert f"--port {container('vllm')['ports'][0]['containerPort']} " in start
    assert f"--k8s-port={container('vllm')['ports'][0]['containerPort']}" in container("router")["args"]


def test_deployment_start_script_serves_the_adapters_of_the_store(tmp_path):
    """Run the script with a `vllm` that prints its arguments."""
    store, out = tmp_path / "adapters", tmp_path / "arguments"
    for name in ("polite", "terse", "not an adapter"):
        (store / name).mkdir(parents=True)
    for name in ("polite", "terse"):
        (store / name / "adapter_config.json").write_text("{}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {out}\n')
    (tmp_path / "bin" / "vllm").chmod(0o755)
    script = named("ConfigMap", "start")["data"]["start.sh"].replace("/adapters/", f"{store}/")
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "MODEL": "some/model"}
    subprocess.run(["sh", "-c", script], env=environment, check=True)
    arguments = out.read_text().splitlines()
    assert arguments[:2] == ["serve", "some/model"]
    at = arguments.index("--lora-modules")
    assert arguments[at + 1 :] == [f"polite={store}/polite", f"terse={store}/terse"]
    for name in ("polite", "terse"):
        (store / name / "adapter_config.json").unlink()
    subprocess.run(["sh", "-c", script], env=environment, check=True)
    assert "--lora-modules" not in out.read_text().splitlines()


def test_deployment_job_asks_every_replica(tmp_path):
    """Run the Job's script with stand-ins for nslookup and curl: one request for each address, with valid JSON."""
    (job,) = objects("load-adapter.yaml")
    (one,) = job["spec"]["template"]["spec"]["containers"]
    assert one["command"][:2] == ["sh", "-ceu"]
    answer = "Server:\t10.0.0.10\nAddress:\t10.0.0.10:53\n\nName: x\nAddress: 10.1.0.1\nAddress: 10.1.0.2\n"
    (tmp_path / "answer").write_text(answer)
    log = tmp_path / "asked"
    commands = {
        "nslookup": f"cat {tmp_path / 'answer'}",
        "curl": f'printf "%s\\n" "$@" end >> {log}',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NAME": "polite"}
    subprocess.run([*one["command"][:2], one["command"][2]], env=environment, check=True)
    asked = [call.splitlines() for call in log.read_text().split("end\n") if call]
    urls = [line for call in asked for line in call if line.startswith("http://")]
    assert urls == [f"http://10.1.0.{n}:8000/v1/load_lora_adapter" for n in (1, 2)]
    for call in asked:
        body = json.loads(call[call.index("--data") + 1])
        assert body == {"lora_name": "polite", "lora_path": "/adapters/polite", "load_inplace": True}


def test_deployment_sizes_are_those_of_serve_plan():
    options = re.search(r"<!-- serve-plan (.*?) -->", PAGE)[1].split()
    shown = invoke("serve-plan", *options).stdout
    table = [line for line in PAGE.splitlines() if line.startswith("| ") and "GiB" in line or "MiB" in line]
    for row, line in {"1,000 files": 0, "1,000 slots": 1, "64 slots": 2, "read by steering": 3}.items():
        size = re.search(rf"{row} +([\d.,]+ [KMG]iB)", shown)[1]
        assert size in table[line], f"{row} is {size}; expected it in {table[line]!r}"
    for time in re.findall(r"([\d.]+ (?:ms|s))\b", "\n".join(PAGE.splitlines()[30:60])):
        assert time in shown, time
    storage = named("PersistentVolumeClaim", "adapters")["spec"]["resources"]["requests"]["storage"]
    assert storage == "16Gi" and "7.82 GiB" in (FOLDER / "kubernetes.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["kubernetes.yaml", "load-adapter.yaml"])
def test_deployment_page_shows_the_files(name):
    assert f'--8<-- "docs/deployment/{name}"' in PAGE and Path(FOLDER / name).is_file()
