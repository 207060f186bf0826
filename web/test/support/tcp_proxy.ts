/** A TCP proxy in front of a service. A test can drop its connections, or switch to another service. */

import { type AddressInfo, connect, createServer, type Server, type Socket } from "node:net";

export class TcpProxy {
  #url = "";
  #target: URL;
  readonly #sockets = new Set<Socket>();
  readonly #server: Server;

  /** @param target - URL of the service. */
  constructor(target: string) {
    this.#target = new URL(target);
    this.#server = createServer((client) => {
      const upstream = connect(Number(this.#target.port), this.#target.hostname);
      for (const [socket, peer] of [
        [client, upstream],
        [upstream, client],
      ] as const) {
        this.#sockets.add(socket);
        socket.on("error", () => socket.destroy());
        socket.on("close", () => {
          this.#sockets.delete(socket);
          peer.destroy();
        });
      }
      client.pipe(upstream).pipe(client);
    });
  }

  get url(): string {
    return this.#url;
  }

  async listen(): Promise<this> {
    await new Promise<void>((resolve) => this.#server.listen(0, "127.0.0.1", resolve));
    this.#url = `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
    return this;
  }

  /** Forwards new connections to another service. */
  switchTo(target: string): void {
    this.#target = new URL(target);
  }

  dropConnections(): void {
    for (const socket of this.#sockets) socket.destroy();
  }

  close(): void {
    this.dropConnections();
    this.#server.close();
  }
}
