"""A command that needs the Hugging Face Hub, where there is no network."""

import subprocess
import sys


def test_the_command_line_says_it_in_one_message() -> None:
    code = (
        "import sys; from huggingface_hub import constants; constants.ENDPOINT = 'http://127.0.0.1:9'; "
        "from deepspec_core.cli.main import main; sys.exit(main(['init', 'organisation/model', '--draft', 'dflash']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("cannot be reached") == 1
    assert len(done.stderr.splitlines()) == 5
