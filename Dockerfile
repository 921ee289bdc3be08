# The image of every node: the official vLLM image (CUDA, torch, vLLM), Ray and this project's dependencies, pinned.
#
#   docker build -t REGISTRY/prefarena:0.1.0-ray2.60.0-vllm0.32.0-torch2.13.0 .
#
# Jobs bring the code that submitted them; the copy in the image is for `prefarena compare` inside it (deploy/rayjob.yaml).
FROM vllm/vllm-openai:v0.32.0

# The cluster launcher copies files with rsync, KubeRay's probes use wget. Their versions are those of the base's release.
RUN apt-get update \
    && apt-get install -y --no-install-recommends rsync wget \
    && rm -rf /var/lib/apt/lists/*

COPY requirements/cluster.txt /tmp/cluster.txt
RUN uv pip install --system --no-cache -r /tmp/cluster.txt \
    && ln -sf "$(command -v python3)" /usr/local/bin/python

COPY pyproject.toml README.md /opt/prefarena/
COPY platform /opt/prefarena/platform
COPY pipelines /opt/prefarena/pipelines
# Without dependencies, which are there. Checked are the versions that are built for each other, the C compiler and the
# Python headers with which attention is compiled on a node, and that every dependency is met.
RUN uv pip install --system --no-cache --no-deps /opt/prefarena \
    && python -c "import ray, torch, vllm; \
found = ray.__version__, torch.__version__.split('+')[0], vllm.__version__.split('+')[0]; \
assert found == ('2.60.0', '2.13.0', '0.32.0'), found" \
    && python -c "from prefarena.cluster.attention import toolchain; \
found = toolchain(); \
assert found.compiler and found.headers, found" \
    && python -c "from importlib.metadata import requires, version; \
from packaging.requirements import Requirement; \
asked = [each for each in map(Requirement, requires('prefarena')) if each.marker is None]; \
unmet = [str(each) for each in asked if not each.specifier.contains(version(each.name), prereleases=True)]; \
assert not unmet, unmet"

# Not root. /shared is where storage that all nodes see is mounted; it must be writable for this user.
RUN useradd --create-home --uid 10001 ray && mkdir /shared && chown ray /shared
USER ray
WORKDIR /home/ray
# Every Ray that is started from this image asks for a token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token).
ENV RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1
ENTRYPOINT []
CMD ["bash"]
