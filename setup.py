"""The native decoder. Everything else is in pyproject.toml.

It needs a C compiler and nothing else: libjpeg-turbo's headers are in native/include and the library
itself is looked up at run time. Where there is no compiler the build goes on without it, and the portable
decoder gives the same pixels, more slowly; `pathfm doctor` says which one is active.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "online_patching.native._jpeg",
            sources=[
                "online_patching/native/_jpeg.c",
                "online_patching/native/_states.c",
                "online_patching/native/_chunks.c",
            ],
            depends=[
                "online_patching/native/_chunks.h",
                "online_patching/native/_states.h",
                "online_patching/native/include/jpeglib.h",
            ],
            # Contraction into fused multiply-adds would round a resampling weight differently
            # from CPU to CPU.
            extra_compile_args=["-O3", "-ffp-contract=off", "-fvisibility=hidden"],
            libraries=["dl", "m"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
