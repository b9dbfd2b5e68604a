"""From what the user names to a server that answers, and what its testbed is."""

import pytest

from tuneship.bench import testbed
from tuneship.bench.target import Target, resolve
from tuneship.core.endpoint import Endpoint, EngineInfo, ServedModel, write_endpoint
from tuneship.core.errors import EndpointError


def _endpoint(url: str, **more) -> Endpoint:
    flags = ["--model-path", "/m", "--port=3", "--dtype", "bfloat16", "--api-key", "k", "--lora-paths", "a=/a", "b=/b"]
    return Endpoint(
        url=url,
        mode="merged",
        pid=1,
        started_at="now",
        engine=EngineInfo(version="0.5.17", flags=[*flags, "--disable-radix-cache"]),
        models=[ServedModel(name="steady", version="steady@1", artifact_id="1", base_id="b")],
        **more,
    )


def test_url_file_and_run_directory_are_the_same_server(server, tmp_path) -> None:
    write_endpoint(_endpoint(server.url), tmp_path / "endpoint.json")
    for where in (server.url, f"{server.url}/v1/", str(tmp_path), str(tmp_path / "endpoint.json")):
        target = resolve(where)
        assert (target.url, target.models) == (server.url, ("steady",))
    assert resolve(str(tmp_path)).endpoint.engine.version == "0.5.17"


def test_models_are_checked(server, behaviour) -> None:
    server.behaviours["other"] = behaviour()
    with pytest.raises(EndpointError, match="serves 2 models") as caught:
        resolve(server.url)
    assert caught.value.hint == "say which with --model: steady, other"
    assert resolve(server.url, "other").models == ("other",)
    assert resolve(server.url, "other, steady").model == "other,steady"
    with pytest.raises(EndpointError, match="no model 'sql'") as caught:
        resolve(server.url, "sql")
    assert caught.value.hint == "it serves: steady, other"


def test_without_a_name_it_is_the_adapter_that_is_measured_not_its_base(server, behaviour, capsys) -> None:
    assert resolve(server.url).models == ("steady",)
    assert capsys.readouterr().err == ""
    server.behaviours["sql"] = behaviour(parent="steady")
    assert resolve(server.url).models == ("sql",)
    assert "no --model: measuring sql, the only adapter" in capsys.readouterr().err
    assert resolve(server.url, "steady").models == ("steady",)
    server.behaviours["mail"] = behaviour(parent="steady")
    with pytest.raises(EndpointError, match="serves 2 adapters") as caught:
        resolve(server.url)
    assert caught.value.hint == "say which with --model: steady, sql, mail"


def test_sglangs_own_server_lists_adapters_that_it_does_not_answer_with(server, behaviour) -> None:
    server.behaviours["sql"], server.owner = behaviour(parent="steady"), "sglang"
    assert resolve(server.url).models == ("steady",)


def test_a_version_is_a_name_too_although_it_is_not_listed(server) -> None:
    assert resolve(server.url, "steady,steady@3fa9c1d20b77").models == ("steady", "steady@3fa9c1d20b77")
    with pytest.raises(EndpointError, match="no model 'sql@3fa9c1d20b77'"):
        resolve(server.url, "sql@3fa9c1d20b77")


def test_keys_come_from_the_environment(server, behaviour, monkeypatch, tmp_path) -> None:
    server.behaviours["secret"] = behaviour()
    with pytest.raises(EndpointError, match="refused the key"):
        resolve(server.url)
    with pytest.raises(EndpointError, match="SESAME holds no key"):
        resolve(server.url, key_env="SESAME")
    monkeypatch.setenv("SESAME", "sesame")
    assert resolve(server.url, "steady", key_env="SESAME").key == "sesame"
    write_endpoint(_endpoint(server.url, key_env="SESAME"), tmp_path / "endpoint.json")
    assert resolve(str(tmp_path), "steady").key == "sesame"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("http://127.0.0.1:9", "http://127.0.0.1:9 does not answer: .*refused"),
        ("127.0.0.1:30000", "neither a URL nor an endpoint.json"),
        ("ftp://127.0.0.1", "ftp://127.0.0.1 does not answer"),
        ("http://[", "does not answer|no list of models"),
        ("{tmp}", "no endpoint at"),
        ("{tmp}/missing.json", "no endpoint at"),
    ],
)
def test_what_is_no_server(tmp_path, where: str, message: str) -> None:
    with pytest.raises(EndpointError, match=message) as caught:
        resolve(where.replace("{tmp}", str(tmp_path)))
    assert caught.value.hint or "[" in where


def test_a_server_of_another_kind(server) -> None:
    with pytest.raises(EndpointError, match="answered 404"):
        resolve(f"{server.url}/elsewhere")
    server.behaviours.clear()
    with pytest.raises(EndpointError, match="serves no model"):
        resolve(server.url)


def test_the_testbed_is_how_it_is_served_not_what_or_where() -> None:
    here = testbed.describe(Target("http://127.0.0.1:1", "", ("m",), _endpoint("http://127.0.0.1:1")))
    assert here.flags == ["--disable-radix-cache", "--dtype bfloat16"]
    assert here.versions["sglang"] == "0.5.17"
    there = testbed.describe(Target("https://models.example.org", "", ("m",)))
    assert there.gpu == "unknown, at models.example.org"
    assert testbed.differences(here, here) == []
    assert any(d.startswith("gpu: ") for d in testbed.differences(here, there))
