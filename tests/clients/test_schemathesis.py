"""schemathesis over /openapi.json of a live server: requests that its schemas allow, and ones that they do not.

No answer is a 5xx, and none has a status, a content type or a body that the document does not name. What a schema allows may be
refused all the same (a model that is not served, a prompt that is too long), so that check alone is left out.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

SERVER = os.environ["TPSERVE_SHORT_URL"]
COMMAND = Path(sys.executable).with_name("schemathesis")
OPTIONS = (
    *("--checks", "all", "--exclude-checks", "positive_data_acceptance"),
    *("--exclude-path-regex", "^/(pause|resume|abort_request)$"),  # these would end the other requests
    *("--phases", "coverage,fuzzing,stateful", "--max-examples", "15", "--generation-deterministic"),
    *("--request-timeout", "60", "--continue-on-failure", "--no-color"),
)
TIMEOUT_S = 1200


def test_no_answer_is_undeclared() -> None:
    run = subprocess.run(
        [COMMAND, "run", f"{SERVER}/openapi.json", *OPTIONS], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    tested, generated = re.search(r"Tested: (\d+)", run.stdout), re.search(r"(\d+) generated", run.stdout)
    assert tested is not None and generated is not None and int(tested[1]) > 25 and int(generated[1]) > 1000
