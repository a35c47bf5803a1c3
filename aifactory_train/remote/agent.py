"""What answers at the other end: one request, read as JSON from standard input. Python 3.6 and its standard library.

It is sent anew with every request, so that it always fits what asks. The text begins after the marker, since a login
shell may print things of its own. Names and values of users come in the request alone; no shell is involved.
"""

import glob
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile

SOURCE, SINK = sys.stdin.buffer, sys.stdout.buffer
PIECE = 1 << 20
MARK = ".aifactory-remote"  # in the one folder: it is ours to delete
SILENT_S = 20  # a request whose heartbeat stands still for so long has nobody at work
LOCK = threading.Lock()
ASK = (
    "import sys, os, json; print(json.dumps([sys.executable, list(sys.version_info[:2]),"
    " os.environ.get('LD_LIBRARY_PATH', '')]))"
)


class RefusedThere(Exception):
    pass


def say(value):
    SINK.write((json.dumps(value) + "\n").encode())
    SINK.flush()


def frame(kind, data):
    with LOCK:
        SINK.write(("%s %d\n" % (kind, len(data))).encode() + data)
        SINK.flush()


def home(request):
    return os.path.abspath(os.path.expanduser(request["folder"]))


def below(folder, name):
    path = os.path.normpath(os.path.join(folder, name))
    if not path.startswith(folder.rstrip("/") + "/"):
        raise RefusedThere("%s is not below %s" % (name, folder))
    return path


def read_json(path):
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def put_json(path, value):
    beside = "%s.%d.tmp" % (path, os.getpid())
    with open(beside, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def digest(path):
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(PIECE), b""):
            found.update(piece)
    return found.hexdigest()


def claim(folder):
    """Make the one folder; refuse one that holds things of others."""
    if not os.path.exists(os.path.join(folder, MARK)):
        if os.path.isdir(folder) and os.listdir(folder):
            raise RefusedThere("%s holds other things; name a new folder (--folder)" % folder)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        open(os.path.join(folder, MARK), "w").close()


# ---- what is here


def facts(request):
    folder = home(request)
    say(
        {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "time": time.time(),
            "host": platform.node(),
            "folder": folder,
            "installed": read_json(os.path.join(folder, "current.json")),
            "ours": os.path.exists(os.path.join(folder, MARK)),
            "rsync": shutil.which("rsync") is not None,
        }
    )


def asked(argv, env=None):
    """[path, [major, minor], library path] of an interpreter, or None."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30, env=env
        )
        found = json.loads(done.stdout.decode().strip().splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None
    return found if tuple(found[1]) >= (3, 10) else None


def pythons(request):
    """The first Python >= 3.10: the one that is asked for, of the path, in usual places, of a module."""
    if request.get("python"):
        found = asked([os.path.expanduser(request["python"]), "-c", ASK])
        return say({"found": found, "tried": [request["python"]]})
    minors = ["3.%d" % n for n in (13, 12, 11, 10)]
    candidates = ["python" + v for v in minors] + ["python3", "python"]
    candidates += sorted(glob.glob("/usr/bin/python3.1?")) + sorted(glob.glob("/opt/*/bin/python3.1?"))
    for name in candidates:
        found = asked([name, "-c", ASK]) if shutil.which(name) else None
        if found:
            return say({"found": found, "tried": candidates})
    tried = list(candidates)
    for name in modules(request.get("modules") or []):
        tried.append("module " + name)
        for python in ("python3", "python"):
            script = 'module load "$1" >/dev/null 2>&1; exec "$2" -c "$3"'
            found = asked(["bash", "-lc", script, "bash", name, python, ASK])
            if found:
                return say({"found": found, "tried": tried})
    say({"found": None, "tried": tried})


def modules(named):
    """Names of modules that may hold Python: those of the profile, then what the module system lists."""
    try:
        done = subprocess.run(
            ["bash", "-lc", "module -t avail 2>&1"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=60,
        )
        listed = done.stdout.decode(errors="replace").split()
    except (OSError, subprocess.TimeoutExpired):
        listed = []
    known = [n.replace("(default)", "") for n in listed if "python" in n.lower() and "/" in n and not n.endswith(":")]
    return list(named) + sorted(known, reverse=True)[:12]


# ---- files


def put(request):
    """Take files: say what is there of each, read the rest, put each in its place whole and with its digest."""
    folder = home(request)
    claim(folder)
    plan: list = []
    for item in request["files"]:
        path = below(folder, item["path"])
        part = path + ".part-" + item["sha256"][:16]
        if (
            os.path.isfile(path)
            and os.path.getsize(path) == item["size"]
            and (item["sha256"] in path or digest(path) == item["sha256"])
        ):
            plan.append(None)
            continue
        os.makedirs(os.path.dirname(path), exist_ok=True)
        there = os.path.getsize(part) if os.path.isfile(part) else 0
        plan.append(there if there <= item["size"] else 0)
    say({"offsets": plan})
    bad = []
    for item, offset in zip(request["files"], plan):
        if offset is None:
            continue
        path = below(folder, item["path"])
        part = path + ".part-" + item["sha256"][:16]
        with open(part, "r+b" if os.path.isfile(part) else "wb") as file:
            file.seek(offset)
            file.truncate()
            left = item["size"] - offset
            while left:
                piece = SOURCE.read1(min(left, PIECE)) if hasattr(SOURCE, "read1") else SOURCE.read(min(left, PIECE))
                if not piece:
                    return
                file.write(piece)
                file.flush()
                left -= len(piece)
            os.fsync(file.fileno())
        if digest(part) != item["sha256"]:
            os.unlink(part)
            bad.append(item["path"])
            continue
        os.chmod(part, item.get("mode", 0o600))
        os.replace(part, path)
    say({"bad": bad})


def found_run(request):
    base = os.path.expanduser(request["work"] or request["folder"])
    for path in (os.path.join(base, request["run"]), os.path.join(base, "runs", request["run"])):
        if any(os.path.exists(os.path.join(path, name)) for name in ("submission", "attempts", "run.yaml")):
            return os.path.abspath(path)
    raise RefusedThere("no run '%s' there" % request["run"])


def listing(request):
    """Files of a run with size and digest; checkpoints where they are asked for; never what is being written."""
    run = found_run(request)
    out = []
    for root, folders, names in os.walk(run):
        at = os.path.relpath(root, run)
        top = at.split(os.sep)[0]
        folders[:] = sorted(n for n in folders if not os.path.islink(os.path.join(root, n)) and not n.startswith("."))
        if top in ("prepared", "cache") or (top == "checkpoints" and not request["checkpoints"]):
            folders[:] = []
            continue
        for name in sorted(names):
            path = os.path.join(root, name)
            if name.startswith(".") or name.endswith((".tmp", ".part")) or os.path.islink(path):
                continue
            try:
                size = os.path.getsize(path)
                found = hashlib.sha256()
                with open(path, "rb") as file:
                    left = size
                    while left:
                        piece = file.read(min(left, PIECE))
                        if not piece:
                            break
                        found.update(piece)
                        left -= len(piece)
            except OSError:
                continue  # taken away meanwhile
            out.append({"path": os.path.normpath(os.path.join(at, name)), "size": size, "sha256": found.hexdigest()})
    say({"run": run, "files": out})


def send(request):
    run = found_run(request)
    for item in request["files"]:
        left = item["size"] - item["offset"]
        try:
            with open(below(run, item["path"]), "rb") as file:
                file.seek(item["offset"])
                while left:
                    piece = file.read(min(left, PIECE))
                    if not piece:
                        break
                    frame("d", piece)
                    left -= len(piece)
        except OSError:
            pass
        frame("n", b"")
    frame("x", b"0")


# ---- the program


def install(request):
    """Unpack wheels into an environment of its own, try it, and make it the current one."""
    folder = home(request)
    place = below(folder, os.path.join("versions", request["key"]))
    python, library = request["python"], request.get("library_path") or ""
    env = dict(os.environ, LD_LIBRARY_PATH=library) if library else None
    beside = "%s.%d.tmp" % (place, os.getpid())
    shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
    made = subprocess.run(
        [python, "-m", "venv", "--without-pip", "--symlinks", beside],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if made.returncode != 0:
        raise RefusedThere(
            "%s makes no environment: %s" % (python, made.stdout.decode(errors="replace").strip()[-300:])
        )
    library_folder = glob.glob(os.path.join(beside, "lib", "python3.*", "site-packages"))[0]
    for name in request["wheels"]:
        with zipfile.ZipFile(below(folder, name)) as archive:
            for member in archive.namelist():
                below(library_folder, member)
            archive.extractall(library_folder)
    os.replace(beside, place)
    inside = os.path.join(place, "bin", "python")
    tried = subprocess.run(
        [inside, "-c", request["probe"]],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
    )
    text = tried.stdout.decode(errors="replace").strip()
    if tried.returncode != 0:
        raise RefusedThere("the program does not start there: %s" % text[-500:])
    put_json(os.path.join(folder, "current.json"), {"key": request["key"], "python": inside, "library_path": library})
    for old in os.listdir(os.path.join(folder, "versions")):
        if old != request["key"]:
            shutil.rmtree(os.path.join(folder, "versions", old), ignore_errors=True)
    shutil.rmtree(os.path.join(folder, "wheels"), ignore_errors=True)
    say({"version": text.splitlines()[-1] if text else "", "python": inside})


def command(request):
    folder = home(request)
    current = read_json(os.path.join(folder, "current.json"))
    if not current or (request.get("key") and current["key"] != request["key"]):
        raise RefusedThere("needs-install")
    env = dict(os.environ)
    env.update(request.get("env") or {})
    if current.get("library_path"):
        env["LD_LIBRARY_PATH"] = current["library_path"]
    for name, value in (request.get("defaults") or {}).items():
        env.setdefault(name, value.replace("{folder}", folder))
    work = os.path.expanduser(request.get("work") or folder)
    try:
        os.makedirs(work, exist_ok=True)
    except OSError as error:
        raise RefusedThere("%s cannot be made: %s" % (work, error.strerror))
    argv = [word.replace("\0folder", folder) for word in request["argv"]]
    return [current["python"], "-m", "aifactory_train"] + argv, env, work


def ends_with_the_client(process):
    """The other end is gone when nothing can be read any more."""

    def watch():
        while SOURCE.read(PIECE):
            pass
        if process is not None:
            process.send_signal(signal.SIGTERM)
        else:
            os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def run(request):
    argv, env, work = command(request)
    process = subprocess.Popen(
        argv, env=env, cwd=work, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    ends_with_the_client(process)

    def pump(kind, stream):
        try:
            for piece in iter(lambda: stream.read1(PIECE), b""):
                frame(kind, piece)
        except (OSError, ValueError):
            process.send_signal(signal.SIGTERM)

    pumps = [threading.Thread(target=pump, args=pair) for pair in (("o", process.stdout), ("e", process.stderr))]
    for thread in pumps:
        thread.start()
    code = process.wait()
    for thread in pumps:
        thread.join()
    frame("x", str(code if code >= 0 else 128 - code).encode())


def once(request):
    """Run a command once for a token, whatever becomes of the connection; whoever asks again is told how it ends."""
    argv, env, work = command(request)
    books = below(home(request), os.path.join("requests", request["token"]))
    os.makedirs(os.path.dirname(books), exist_ok=True)
    while True:
        try:
            os.mkdir(books)
        except FileExistsError:
            if os.path.exists(os.path.join(books, "rc")) or lives(books):
                break
            try:
                os.rename(books, "%s.dead-%d" % (books, time.time() * 1000))
            except OSError:
                pass
            continue
        begin(books, argv, env, work)
        break
    ends_with_the_client(None)
    follow(books, request["out"], request["err"])


def lives(books):
    """Whether somebody is at work on it: its heartbeat moves. Clocks are not compared."""

    def beat():
        try:
            return os.stat(os.path.join(books, "alive")).st_mtime_ns
        except OSError:
            return None

    first, end = beat(), time.time() + SILENT_S
    while time.time() < end:
        time.sleep(0.2)
        if beat() != first or os.path.exists(os.path.join(books, "rc")):
            return True
    return False


def begin(books, argv, env, work):
    if os.fork():
        os.wait()
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        with open(os.path.join(books, "out"), "wb") as out, open(os.path.join(books, "err"), "wb") as err:
            process = subprocess.Popen(argv, env=env, cwd=work, stdin=null, stdout=out, stderr=err)
            beats = 0
            while True:
                try:
                    code = process.wait(timeout=0.1)
                    break
                except subprocess.TimeoutExpired:
                    beats += 1
                    if beats % 10 == 1:
                        with open(os.path.join(books, "alive"), "w") as file:
                            file.write(str(beats))
        put_json(os.path.join(books, "rc"), code if code >= 0 else 128 - code)
    finally:
        os._exit(0)


def follow(books, out, err):
    """Show what a request wrote from these positions on, until it ends. A beat that stands still is told as a cut."""
    places = {"o": ["out", out], "e": ["err", err]}
    moved = time.time()
    seen = None
    while True:
        code = read_json(os.path.join(books, "rc"))
        for kind, place in places.items():
            try:
                with open(os.path.join(books, place[0]), "rb") as file:
                    file.seek(place[1])
                    data = file.read()
            except OSError:
                continue
            if data:
                place[1] += len(data)
                frame(kind, data)
        if code is not None:
            return frame("x", str(code).encode())
        try:
            beat = os.stat(os.path.join(books, "alive")).st_mtime_ns
        except OSError:
            beat = None
        if beat != seen:
            seen, moved = beat, time.time()
        elif time.time() - moved > SILENT_S:
            raise RefusedThere("what worked on it there was killed; ask again")
        time.sleep(0.05)


def remove(request):
    folder = home(request)
    if not os.path.exists(folder):
        return say({"removed": False})
    if not os.path.exists(os.path.join(folder, MARK)):
        raise RefusedThere("%s was not made by 'aifactory remote add'; nothing is deleted" % folder)
    kept = sorted(os.listdir(os.path.join(folder, "runs"))) if os.path.isdir(os.path.join(folder, "runs")) else []
    kept = [name for name in kept if not name.startswith(".")]
    if kept and not request["runs"]:
        raise RefusedThere(
            "it holds %d run(s): %s; bring them home with 'aifactory get', or give --runs"
            % (len(kept), ", ".join(kept[:5]))
        )
    shutil.rmtree(folder)
    say({"removed": True})


OPERATIONS = {f.__name__: f for f in (facts, pythons, put, listing, send, install, run, once, remove)}


def main():
    request = json.loads(SOURCE.readline().decode())
    SINK.write((request["marker"] + "\n").encode())
    SINK.flush()
    try:
        OPERATIONS[request["op"]](request)
    except RefusedThere as error:
        say_refusal(str(error))
    except OSError as error:
        say_refusal("%s: %s" % (error.filename or request["op"], error.strerror))


def say_refusal(text):
    data = text.encode()
    SINK.write(("r %d\n" % len(data)).encode() + data)
    SINK.flush()


if __name__ == "__main__":
    main()
