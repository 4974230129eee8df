/** A real `arriero serve` with the demo model on a free port; can be killed and started again. */

const { spawn } = require("node:child_process");
const net = require("node:net");
const path = require("node:path");

const ROOT = path.resolve(__dirname, "../..");
const START_MS = 120_000;

const freePort = () =>
  new Promise((resolve) => {
    const listener = net.createServer().listen(0, "127.0.0.1", () => {
      const { port } = listener.address();
      listener.close(() => resolve(port));
    });
  });

class Server {
  constructor(port, flags) {
    this.port = port;
    this.flags = flags;
    this.url = `http://127.0.0.1:${port}/`;
  }

  static async start(...flags) {
    const server = new Server(await freePort(), flags);
    await server.run();
    return server;
  }

  async run() {
    const args = ["serve", "--port", String(this.port), "--max-num-seqs", "4", ...this.flags];
    this.process = spawn(path.join(ROOT, ".venv/bin/arriero"), args, { cwd: ROOT });
    this.log = "";
    this.process.stderr.on("data", (chunk) => (this.log += chunk));
    this.exited = new Promise((resolve) => this.process.once("exit", resolve));
    const deadline = Date.now() + START_MS;
    while (!(await this.isReady())) {
      if (this.process.exitCode !== null || Date.now() > deadline) {
        this.process.kill("SIGKILL");
        throw new Error(`the server did not start:\n${this.log}`);
      }
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
  }

  async isReady() {
    return fetch(`${this.url}health/ready`).then(
      (response) => response.ok,
      () => false,
    );
  }

  async engine(key) {
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    return (await fetch(`${this.url}v1/engine`, { headers })).json();
  }

  async kill() {
    this.process.kill("SIGKILL");
    await this.exited;
  }
}

module.exports = { Server };
