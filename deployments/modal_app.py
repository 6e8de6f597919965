"""One run on Modal:  modal run deployments/modal_app.py --recipe configs/quickstart.yaml

The secret `regrow-s3` holds AWS_* and REGROW_STORE (a bucket): a container that is taken away costs no more than the
steps since its last checkpoint, because the retry finds it in the store.
"""

from pathlib import Path

import modal

ROOT = Path(__file__).parents[1]

image = modal.Image.from_dockerfile(ROOT / "deployments" / "Dockerfile", context_dir=ROOT)
app = modal.App("regrow", image=image)


@app.function(gpu="H100", timeout=24 * 3600, retries=3, secrets=[modal.Secret.from_name("regrow-s3")])
def run(text: str) -> int:
    """Run a recipe's text; return the exit code. What another try can mend is raised, so that Modal tries again."""
    import subprocess
    import tempfile

    recipe = Path(tempfile.gettempdir()) / "recipe.yaml"
    recipe.write_text(text)
    code = subprocess.run(["regrow", "run", str(recipe)], check=False).returncode
    if code in (1, 75):
        raise RuntimeError(f"regrow ended with {code}; the next try goes on where it was")
    return code


@app.local_entrypoint()
def main(recipe: str) -> None:
    """Send a local recipe."""
    raise SystemExit(run.remote(Path(recipe).read_text()))
