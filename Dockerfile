# docker build --tag trl-tpgrpo .
# docker run --gpus all --ipc host --env HF_TOKEN --volume "$HOME/.cache/huggingface:/root/.cache/huggingface" \
#     --volume "$PWD/outputs:/workspace/outputs" trl-tpgrpo train --config examples/recipes/testbed.yaml \
#     --output_dir outputs/first

# The PyTorch of constraints.txt. With a driver that is too old for CUDA 13: 2.13.0-cuda12.6-cudnn9-runtime
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${BASE}

# The image has the Python of Ubuntu, which pip otherwise does not install into
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1

WORKDIR /opt/trl-tpgrpo
COPY pyproject.toml README.md LICENSE MANIFEST.in constraints.txt ./
COPY trl_tpgrpo trl_tpgrpo
ARG EXTRAS=testbed,remote
RUN pip install --constraint constraints.txt ".[${EXTRAS}]"

WORKDIR /workspace
COPY examples examples
ENTRYPOINT ["trl-tpgrpo"]
