// Keeps the page itself for later visits without a network; the model is kept by the page (Cache Storage, by hash).
// It also adds the headers that WebAssembly threads need, for servers that cannot be told to send them.
const CACHE = `edgesd-page-${"__VERSION__"}`;
const FILES = "__FILES__";

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(FILES)).then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => {
  const stale = (name) => name.startsWith("edgesd-page-") && name !== CACHE;
  event.waitUntil(
    caches.keys()
      .then((names) => Promise.all(names.filter(stale).map((name) => caches.delete(name))))
      .then(() => self.clients.claim()),
  );
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  const url = new URL(request.url);
  const mine = url.origin === location.origin && request.method === "GET" && !request.headers.has("range");
  if (!mine || url.pathname.includes("/bundle/") || url.searchParams.has("bundle-file")) return;
  event.respondWith(answer(request));
});

async function answer(request) {
  const cache = await caches.open(CACHE);
  const named = /\/assets\//.test(request.url); // built names hold a hash: what is here is right
  const kept = named ? await cache.match(request) : undefined;
  if (kept !== undefined) return isolated(kept);
  try {
    const response = await fetch(request);
    if (response.ok && response.type === "basic") await cache.put(request, response.clone());
    return isolated(response);
  } catch (error) {
    const last = await cache.match(request, { ignoreSearch: request.mode === "navigate" });
    const page = last ?? (request.mode === "navigate" ? await cache.match("./") : undefined);
    if (page === undefined) throw error;
    return isolated(page);
  }
}

function isolated(response) {
  if (response.status === 0 || response.body === null) return response;
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  headers.set("Cross-Origin-Resource-Policy", "same-origin");
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
