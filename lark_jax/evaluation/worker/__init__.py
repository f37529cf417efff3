"""The generation worker: `python .../worker/main.py REQUEST.json`, in its own process and perhaps another virtualenv.

Its modules import the standard library, one engine, and each other by bare name; never lark_jax, which need not be
installed where they run. lark_jax itself imports only `worker_records` and `server_client`.
"""
