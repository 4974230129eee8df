"""The page at /: complete, self-contained, under a strict policy, and open where it must be."""

import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from app.api.routes.static import PAGE_FILES
from app.factory import create_app
from app.settings import ServerSettings
from tests.api.serve import client_of, run
from tests.fake_engine import FakeEngine, make_context, says

FOLDER = Path(__file__).resolve().parents[2] / "app" / "api" / "static"
FILES = sorted(FOLDER.iterdir())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
CLOSED = [
    "/v1/engine",
    "/static",
    "/static/",
    "/static//playground.js",
    "/static/../v1/models",
    "/static/%2e%2e/v1/models",
    "/static/playground.js/",
    "/static/index.html",
    "/index.html",
]


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def page() -> list[tuple[str, dict[str, str | None]]]:
    return Elements((FOLDER / "index.html").read_text("utf-8")).found


@pytest.mark.parametrize(("path", "entry"), PAGE_FILES.items())
def test_file_comes_whole_with_its_type_and_headers(path, entry):
    name, content_type = entry

    async def scenario():
        async with client_of(FakeEngine(says("x"))) as client:
            response = await client.get(path)
            head = await client.head(path)
        assert response.status_code == head.status_code == 200
        assert response.content == (FOLDER / name).read_bytes()
        assert head.content == b""
        assert response.headers["content-type"] == content_type
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-cache"

    run(scenario())


def test_policy_lets_in_nothing_from_elsewhere_and_no_inline_code():
    async def scenario():
        async with client_of(FakeEngine(says("x"))) as client:
            policy = (await client.get("/")).headers["content-security-policy"]
        parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
        assert parts == POLICY

    run(scenario())


@pytest.mark.parametrize("form", ["{}", "W/{}", '"old", {}', "*"])
def test_known_file_is_not_sent_again(form):
    async def scenario():
        async with client_of(FakeEngine(says("x"))) as client:
            etag = (await client.get("/")).headers["etag"]
            again = await client.get("/", headers={"if-none-match": form.format(etag)})
            other = await client.get("/", headers={"if-none-match": '"old"'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        assert "content-security-policy" in again.headers
        assert other.status_code == 200

    run(scenario())


@pytest.mark.parametrize("path", PAGE_FILES)
def test_page_is_open_without_a_key(path):
    async def scenario():
        async with client_of(FakeEngine(says("x")), api_keys=("secret",)) as client:
            assert (await client.get(path)).status_code == 200
            assert (await client.post(path)).status_code == 405

    run(scenario())


def test_page_is_open_under_a_root_path():
    async def scenario():
        app = create_app(make_context(FakeEngine(says("x"))), ServerSettings(api_keys=("secret",)))
        transport = httpx.ASGITransport(app=app, root_path="/llm")
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/llm/")).status_code == 200
            assert (await client.get("/llm/static/playground.js")).status_code == 200
            assert (await client.get("/llm/v1/engine")).status_code == 401

    run(scenario())


@pytest.mark.parametrize("path", CLOSED)
def test_page_opens_nothing_beside_it(path):
    async def scenario():
        async with client_of(FakeEngine(says("x")), api_keys=("secret",)) as client:
            assert (await client.get(path)).status_code == 401

    run(scenario())


def test_table_of_files_is_the_folder():
    assert {name for name, _ in PAGE_FILES.values()} == {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_file_names_no_other_place(path):
    text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"(https?:)?//[\w-]+\.\w", text)
    assert not re.search(r"@import|\burl\(", text)  # `data:` would do no harm, but none is needed


def test_page_has_no_inline_script_style_or_handler():
    for tag, attributes in page():
        assert tag != "style"
        assert tag != "script" or attributes.get("src")
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_makes_no_markup_of_text(path):
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    assert not re.search(forbidden, path.read_text("utf-8"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_imports_files_that_are_there(path):
    imported = re.findall(r'from "\./([^"]+)"', path.read_text("utf-8"))
    assert {f"/static/{name}" for name in imported} <= PAGE_FILES.keys()


def test_page_refers_to_files_that_are_there():
    sources = [attributes.get("src") or attributes.get("href") for _, attributes in page()]
    named = {f"/{source}" for source in sources if source and not source.startswith("#")}
    assert named <= PAGE_FILES.keys()


def test_scripts_ask_for_elements_that_are_there():
    known = {attributes["id"] for _, attributes in page() if "id" in attributes}
    asked = {
        name for path in SCRIPTS for name in re.findall(r'byId\("([^"]+)"\)', path.read_text())
    }
    assert asked
    assert asked <= known


def test_key_is_kept_in_the_session_alone():
    text = "".join(path.read_text("utf-8") for path in SCRIPTS)
    assert "sessionStorage" in text
    assert "localStorage" not in text
    assert "document.cookie" not in text


def test_engine_view_tells_counters_and_limits():
    async def scenario():
        engine = FakeEngine(says("abc"))
        async with client_of(engine) as client:
            before = (await client.get("/v1/engine")).json()
            await client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 3})
            after = (await client.get("/v1/engine")).json()
        assert before["object"] == "engine"
        assert before["block_size"] == engine.limits.block_size
        assert before["max_num_seqs"] == engine.limits.max_num_seqs
        assert {"num_requests_running", "num_blocks", "prefix_cache_hits"} <= before.keys()
        assert (before["generation_tokens"], after["generation_tokens"]) == (0, 3)
        assert after["prompt_tokens"] - before["prompt_tokens"] == 6
        assert after["clock_s"] > before["clock_s"]

    run(scenario())
