"""Builds every overlay of packaging/kubernetes and checks what it makes, without a cluster:

- Kubernetes' own kinds against their schemas, strictly; other kinds against scripts/deploy/schemas.yaml;
- that names match: selectors, ports, volumes, claims, targets of autoscalers, plugins of the endpoint picker;
- that pods get the time to stop that their arguments need, and that a claim of one pod is used by one replica;
- that every component is used by an overlay.

Run by scripts/lint-scripts.sh, with kubectl in PATH. `load_overlays` is also used by monitoring.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import yaml

KUBERNETES = Path("packaging/kubernetes")
MARGIN = 15  # seconds between the longest drain and SIGKILL


def load_overlays():
    """The objects of each overlay, by its name."""
    overlays = {}
    for folder in sorted((KUBERNETES / "overlays").iterdir()):
        built = subprocess.run(
            ["kubectl", "kustomize", folder], check=True, stdout=subprocess.PIPE, text=True
        )
        overlays[folder.name] = list(yaml.safe_load_all(built.stdout))
    return overlays


def json_schema(short):
    """The JSON schema that an entry of schemas.yaml stands for. It allows no other fields."""
    if short == "duration":
        return {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
    if isinstance(short, str):
        return {"type": short}
    if "object" in short:
        fields = {name: json_schema(field) for name, field in short["object"].items()}
        return {
            "type": "object",
            "properties": fields,
            "required": short.get("required", []),
            "additionalProperties": False,
        }
    if "list" in short:
        return {"type": "array", "items": json_schema(short["list"])}
    if "map" in short:
        return {"type": "object", "additionalProperties": json_schema(short["map"])}
    if "choices" in short:
        return {"oneOf": [json_schema(choice) for choice in short["choices"]]}
    return short


def pod_spec(document):
    """The pods of a Deployment, StatefulSet or Job; None for other kinds."""
    return document.get("spec", {}).get("template", {}).get("spec")


def kiln_containers(documents):
    """Every container that runs kiln, with its object."""
    for document in documents:
        for container in (pod_spec(document) or {}).get("containers", []):
            if container["image"].startswith("kiln:"):
                yield document, container


def flag(container, name, default):
    """The whole number that an argument such as --name=5 or a variable gives."""
    found = [argument for argument in container["args"] if argument.startswith(f"--{name}=")]
    variable = "KILN_" + name.upper().replace("-", "_")
    found += [it["value"] for it in container.get("env", []) if it["name"] == variable]
    return int(found[0].rpartition("=")[2]) if found else default


class Overlay:
    """The objects of an overlay, with the checks. Problems are collected."""

    def __init__(self, name, documents):
        self.name = name
        self.documents = documents
        self.problems = []

    def expect(self, holds, message):
        if not holds:
            self.problems.append(f"{self.name}: {message}")

    def all(self, kind):
        return [document for document in self.documents if document["kind"] == kind]

    def names(self, kind):
        return {document["metadata"]["name"] for document in self.all(kind)}

    def pods(self):
        """Every object with pods: its name, their labels and their specification."""
        for document in self.documents:
            spec = pod_spec(document)
            if spec:
                metadata = document["spec"]["template"]["metadata"]
                yield document, metadata.get("labels", {}), spec

    def matching(self, labels):
        """The objects whose pods have these labels."""
        wanted = labels.items()
        return [document for document, own, _ in self.pods() if wanted <= own.items()]

    def check(self):
        seen = set()
        for document in self.documents:
            key = (document["kind"], document["metadata"]["name"])
            self.expect(key not in seen, f"{key} is there twice")
            seen.add(key)
        self.check_pods()
        self.check_services()
        self.check_autoscalers()
        self.check_pools()
        for document in self.all("PodDisruptionBudget"):
            found = self.matching(document["spec"]["selector"]["matchLabels"])
            self.expect(len(found) == 1, f"PodDisruptionBudget {document['metadata']['name']} chooses {len(found)} objects")
            self.expect(document["spec"]["maxUnavailable"] == 1, "a PodDisruptionBudget allows more than one pod")

    def check_pods(self):
        for document, labels, spec in self.pods():
            name = document["metadata"]["name"]
            selector = document["spec"].get("selector", {}).get("matchLabels", {})
            self.expect(selector.items() <= labels.items(), f"{name}: the selector does not match the pods")
            for constraint in spec.get("topologySpreadConstraints", []):
                spread = constraint["labelSelector"]["matchLabels"]
                self.expect(spread.items() <= labels.items(), f"{name}: the spread counts other pods")
            volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
            templates = document["spec"].get("volumeClaimTemplates", [])
            known = volumes.keys() | {template["metadata"]["name"] for template in templates}
            for container in spec["containers"]:
                mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
                self.expect(mounted == known, f"{name}: volumes {known}, of which {mounted} are mounted")
                ports = {port["name"] for port in container.get("ports", [])}
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    port = container.get(probe, {}).get("httpGet", {}).get("port")
                    self.expect(port is None or port in ports, f"{name}: {probe} names port {port}")
                security = container["securityContext"]
                self.expect(
                    security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"],
                    f"{name}: the container has more rights than it needs",
                )
            self.expect(spec["securityContext"]["runAsNonRoot"], f"{name} runs as root")
            replicas = document["spec"].get("replicas", 2)
            for volume in volumes.values():
                self.check_volume(name, volume, replicas)
        for document, container in kiln_containers(self.documents):
            wanted = flag(container, "shutdown-delay", 0) + flag(container, "drain-timeout", 60) + MARGIN
            given = pod_spec(document)["terminationGracePeriodSeconds"]
            self.expect(given == wanted, f"{document['metadata']['name']} has {given} s to stop and needs {wanted}")

    def check_volume(self, name, volume, replicas):
        config = volume.get("configMap", {}).get("name")
        self.expect(config is None or config in self.names("ConfigMap"), f"{name}: no ConfigMap {config}")
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim is None:
            return
        claims = [it for it in self.all("PersistentVolumeClaim") if it["metadata"]["name"] == claim]
        self.expect(claims, f"{name}: no claim {claim}")
        for found in claims:
            shared = "ReadWriteMany" in found["spec"]["accessModes"]
            self.expect(shared or replicas == 1, f"{name}: {replicas} replicas share the claim {claim} of one pod")

    def check_services(self):
        for document in self.all("Service"):
            name = document["metadata"]["name"]
            found = self.matching(document["spec"]["selector"])
            self.expect(len(found) == 1, f"Service {name} chooses {len(found)} objects")
            for owner in found:
                ports = [port for it in pod_spec(owner)["containers"] for port in it["ports"]]
                names = {port["name"] for port in ports}
                for port in document["spec"]["ports"]:
                    self.expect(port["targetPort"] in names, f"Service {name}: no port {port['targetPort']}")
        for document in self.all("StatefulSet"):
            self.expect(document["spec"]["serviceName"] in self.names("Service"), "a StatefulSet has no Service")
        for document in self.all("ServiceMonitor"):
            ports = {port["name"] for service in self.all("Service") for port in service["spec"]["ports"]}
            for endpoint in document["spec"]["endpoints"]:
                self.expect(endpoint["port"] in ports, "a ServiceMonitor names an unknown port")
        for document in self.all("NetworkPolicy"):
            found = self.matching(document["spec"]["podSelector"]["matchLabels"])
            self.expect(len(found) == 1, "a NetworkPolicy chooses no pods")

    def check_autoscalers(self):
        for document in self.all("ScaledObject"):
            target = document["spec"]["scaleTargetRef"]["name"]
            found = [it for it in self.all("Deployment") if it["metadata"]["name"] == target]
            self.expect(len(found) == 1, f"a ScaledObject names {target}")
            for deployment in found:
                self.expect("replicas" not in deployment["spec"], f"{target} has replicas beside a ScaledObject")
            for trigger in document["spec"]["triggers"]:
                address = trigger["metadata"].get("natsServerMonitoringEndpoint")
                if address:
                    service, namespace = address.split(".")[:2]
                    self.expect(service in self.names("Service"), f"a ScaledObject asks {address}")
                    own = document["metadata"]["namespace"]
                    self.expect(namespace == own, f"a ScaledObject asks in {namespace}, not in {own}")
                    models = {
                        re.sub("[^A-Za-z0-9-]", lambda it: f"_{ord(it[0]):02X}", container["args"][0])
                        for owner, container in kiln_containers(self.documents)
                        if owner["metadata"]["name"] == target
                    }
                    consumer = trigger["metadata"]["consumer"]
                    self.expect({consumer} == models, f"a ScaledObject reads {consumer}, for {models}")
                query = trigger["metadata"].get("query", "")
                for namespace in re.findall(r'namespace="([^"]*)"', query):
                    own = document["metadata"]["namespace"]
                    self.expect(namespace == own, f"a ScaledObject's query is for {namespace}, not {own}")

    def check_pools(self):
        for document in self.all("InferencePool"):
            spec = document["spec"]
            found = self.matching(spec["selector"]["matchLabels"])
            self.expect(len(found) == 1, f"an InferencePool chooses {len(found)} objects")
            for owner in found:
                ports = {port["containerPort"] for it in pod_spec(owner)["containers"] for port in it["ports"]}
                for port in spec["targetPorts"]:
                    self.expect(port["number"] in ports, f"an InferencePool names port {port['number']}")
            picker = spec["endpointPickerRef"]
            services = [it for it in self.all("Service") if it["metadata"]["name"] == picker["name"]]
            offered = {port["port"] for it in services for port in it["spec"]["ports"]}
            self.expect(picker["port"]["number"] in offered, "an InferencePool names no port of its picker")
        for document in self.all("HTTPRoute"):
            for rule in document["spec"]["rules"]:
                for backend in rule["backendRefs"]:
                    self.expect(backend["name"] in self.names(backend["kind"]), f"a route leads to {backend['name']}")
        for config in picker_configs(self.documents):
            plugins = {plugin.get("name", plugin["type"]) for plugin in config["plugins"]}
            named = set(re.findall(r"'pluginRef': '([^']*)'", str(config)))
            self.expect(named == plugins, f"plugins {plugins}, of which {named} are used")


def picker_configs(documents):
    """The configurations of llm-d's endpoint picker."""
    for document in documents:
        for text in document.get("data", {}).values() if document["kind"] == "ConfigMap" else []:
            if "kind: EndpointPickerConfig" in text:
                yield yaml.safe_load(text)


def check_schemas(name, documents, schemas):
    """Checks each object against the schema of its kind. Returns the numbers of Kubernetes' kinds and of others."""
    import kubernetes_validate

    version = kubernetes_validate.latest_version()
    own = 0
    for document in documents:
        kind = f"{document['apiVersion']} {document['kind']}"
        if kind not in schemas:
            kubernetes_validate.validate(document, version, strict=True)
            continue
        own += 1
        allowed = {"apiVersion", "kind", "metadata", "spec"}
        assert document.keys() <= allowed, f"{name}: {kind} has {document.keys() - allowed}"
        jsonschema.validate(document["spec"], json_schema(schemas[kind]))
    for config in picker_configs(documents):
        kind = f"{config.pop('apiVersion')} {config.pop('kind')}"
        jsonschema.validate(config, json_schema(schemas[kind]))
    return len(documents) - own, own


def unused_components(names):
    """Components that no overlay has, directly or through another component."""
    used = set()

    def visit(folder):
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
        for entry in kustomization.get("components", []):
            component = (folder / entry).resolve()
            used.add(component.name)
            visit(component)

    for name in names:
        visit(KUBERNETES / "overlays" / name)
    return {folder.name for folder in (KUBERNETES / "components").iterdir()} - used


def main():
    schemas = yaml.safe_load(Path("scripts/deploy/schemas.yaml").read_text())
    overlays = load_overlays()
    problems = []
    for name, documents in overlays.items():
        builtin, other = check_schemas(name, documents, schemas)
        overlay = Overlay(name, documents)
        overlay.check()
        problems += overlay.problems
        print(f"{name}: {builtin} objects of Kubernetes, {other} of extensions")
    unused = unused_components(overlays)
    if unused:
        problems.append(f"no overlay has the components {sorted(unused)}")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
