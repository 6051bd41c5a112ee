// The server's API: requests with the key, errors as the server words them, and its streams.

const KEY = 'kiln-key';

/** What the server refused, in its own words. */
export class ServerError extends Error {
  constructor({ status, message, param = null, retryAfter = null }) {
    super(message);
    this.status = status;
    /** The key of the request that is to blame. */
    this.param = param;
    /** Seconds. */
    this.retryAfter = retryAfter;
  }
}

/** There was no answer, or only a part of it. */
export class ConnectionError extends Error {}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

async function ask(path, options) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: 'no-store' });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ConnectionError('The server does not answer. It may have ended, or the network may be down.');
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { status, headers } = response;
  const body = await response.json().catch(() => null);
  // A proxy between here and the server has its own form.
  const { message = `The server answered with status ${status}.`, param } = body?.error ?? {};
  const seconds = Number.parseInt(headers.get('Retry-After'), 10);
  return new ServerError({ status, message, param, retryAfter: Number.isNaN(seconds) ? null : seconds });
}

export function get(path) {
  return ask(path, {}).then((response) => response.json());
}

export function post(path, body, signal) {
  const headers = { 'Content-Type': 'application/json' };
  return ask(path, { method: 'POST', headers, body, signal });
}

/** The data of each server-sent event of an answer. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    // Only what has just come can hold the end of an event.
    if (!value.includes('\n')) continue;
    const blocks = text.split('\n\n');
    text = blocks.pop();
    for (const block of blocks) {
      const lines = block.split('\n').filter((line) => line.startsWith('data:'));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join('\n');
    }
  }
}
