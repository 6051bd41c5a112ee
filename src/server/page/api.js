// Client of the server's API: requests with the API key, error responses, and event streams.

const KEY = 'kiln-key';

/** An error response of the server, with its message. */
export class ServerError extends Error {
  constructor({ status, message, param = null, retryAfter = null }) {
    super(message);
    this.status = status;
    /** Name of the invalid request parameter, or null. */
    this.param = param;
    /** Seconds to wait before retrying, or null. */
    this.retryAfter = retryAfter;
  }
}

/** The server did not respond, or the response ended early. */
export class ConnectionError extends Error {}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

async function request(path, options) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const response = await answer(path, { ...options, headers, cache: 'no-store' });
  if (!response.ok) throw await serverError(response);
  return response;
}

/** The response to a request, whatever its status. */
async function answer(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ConnectionError('The server does not answer. It may have stopped, or the network may be down.');
  }
}

async function serverError(response) {
  const { status, headers } = response;
  const body = await response.json().catch(() => null);
  // The body may come from a proxy and have another form.
  const { message = `The server answered with status ${status}.`, param } = body?.error ?? {};
  const seconds = Number.parseInt(headers.get('Retry-After'), 10);
  return new ServerError({ status, message, param, retryAfter: Number.isNaN(seconds) ? null : seconds });
}

export function get(path) {
  return request(path, {}).then((response) => response.json());
}

/** The start of the server, as `/health/ready` reports it, or null if the start is over. */
export async function startOfServer() {
  const response = await answer('health/ready', { cache: 'no-store' });
  const body = await response.json().catch(() => null);
  return body?.status === 'loading' ? body : null;
}

export function post(path, body, signal) {
  const headers = { 'Content-Type': 'application/json' };
  return request(path, { method: 'POST', headers, body, signal });
}

export function remove(path) {
  return request(path, { method: 'DELETE' });
}

/** The file at a path, as a blob. */
export function file(path) {
  return request(path, {}).then((response) => response.blob());
}

export function text(path) {
  return request(path, {}).then((response) => response.text());
}

/** Yields the data of each server-sent event of a response. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    // Without a line break the new text does not end an event.
    if (!value.includes('\n')) continue;
    const blocks = text.split('\n\n');
    text = blocks.pop();
    for (const block of blocks) {
      const lines = block.split('\n').filter((line) => line.startsWith('data:'));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join('\n');
    }
  }
}
