"""Generations: their queue, life cycle, event log and storage.

These statements always hold, whatever fails. "Accepted" means that the caller has received the generation's id.

1. An accepted generation stays accepted. It ends exactly once, with a typed end, even if the process crashes (with a
   state folder), the disk is full, or a restarted server has fewer slots or lower limits. `lifecycle` restores it.
2. An end never changes. It is on disk before any reader sees it; otherwise its last message and its line in the log
   have `not_persisted`. `index` and `state_writer` order this. If the stored end is damaged, readers get `DataLoss` and
   never wrong content. With a state folder, `Draining` is not an end of the generation but of this process: the next
   one runs it again.
3. A request id never starts two generations of one caller while the first one is retained. The same seed and parameters
   produce the same image.
4. A generation that crashes the process is tried twice, and then ends with `EngineCrashed`. Each attempt is on disk
   before the engine starts. `restored` and `slots` have the rules.
5. No exception of any class, on any thread, leaves a generation without an end, or a server that ignores SIGTERM.
   `runner` turns every outcome into an end.
6. No caller, with or without a key, can lock others out: connections, queue places, slots and memory are shared fairly.
   `admission` and `slots` share the engine; `auth.quotas` and `transport.net` limit callers and connections.
7. Health probes tell the truth under load and under attack: they have reserved capacity, and they report a state folder
   that cannot be written (`Store.problem`).
8. Everything that can hang (disk, encoder, device, client) has a time limit, and exceeding it is reported.
"""
