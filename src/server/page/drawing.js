// Generating pictures: the request, its progress and its result.

import { ConnectionError, ServerError, events, post } from './api.js';

/** Largest number of previews of a request; each costs device time. */
const PREVIEWS = 6;
/** Seconds between checks whether a full queue has room. */
const CHECK_INTERVAL = 3;

/** The server's estimate of waiting time and duration. The prompt is not sent. */
export async function estimate(settings, signal) {
  const request = { ...settings, prompt: '', seed: undefined };
  const response = await post('v1/images/estimate', JSON.stringify(request), signal);
  return response.json();
}

/**
 * Generates pictures. Calls `onProgress` with `{ stage: 'full' | 'queued' | 'step' | 'preview', … }`.
 * If the queue is full, waits until it has room, at most for the time that the server suggests, and
 * sends the request again.
 *
 * Returns the files as blobs, and the server's last event, which has the metadata.
 */
export async function draw(settings, signal, onProgress) {
  for (;;) {
    try {
      return await drawOnce(settings, signal, onProgress);
    } catch (error) {
      if (error.status !== 429 || error.retryAfter === null) throw error;
      for (let seconds = error.retryAfter; seconds > 0; seconds -= 1) {
        onProgress({ stage: 'full', message: error.message, seconds });
        await second(signal);
        if (seconds % CHECK_INTERVAL === 0 && (await estimate(settings, signal)).accepted) break;
      }
    }
  }
}

/** Waits for one second. */
function second(signal) {
  return new Promise((resolve, reject) => {
    const abort = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener('abort', abort);
      resolve();
    }, 1000);
    signal.addEventListener('abort', abort, { once: true });
  });
}

async function drawOnce(settings, signal, onProgress) {
  const response = await post('v1/chat/completions', requestBody(settings), signal);
  let files = null;
  try {
    for await (const data of events(response)) {
      if (data === '[DONE]') continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError({ ...chunk.error, status: chunk.error.code });
      const { progress, choices = [] } = chunk;
      if (progress?.stage === 'preview') {
        onProgress({ ...progress, file: fileOf(progress.image_url.url) });
      } else if (progress) {
        onProgress(progress);
      }
      files ??= choices[0]?.delta?.images?.map((image) => fileOf(image.image_url.url));
      if (choices[0]?.finish_reason) return { files, facts: chunk };
    }
  } catch (error) {
    if (signal.aborted || error instanceof ServerError) throw error;
  }
  throw new ConnectionError('The connection ended before the picture was finished.');
}

function requestBody({ prompt, seed, ...fields }) {
  return withSeed(seed, {
    messages: [{ role: 'user', content: prompt }],
    stream: true,
    preview_every: Math.max(1, Math.ceil(fields.num_inference_steps / PREVIEWS) || 1),
    ...fields,
  });
}

/** The JSON of a request with the seed that was written, if one was. */
export function withSeed(seed, fields) {
  const body = JSON.stringify(fields);
  if (seed === '') return body;
  // Seeds have up to 64 bits, so they are inserted as text. The server refuses what is not a number.
  const digits = /^(0|[1-9]\d*)$/.test(seed) ? seed : JSON.stringify(seed);
  return `${body.slice(0, -1)},"seed":${digits}}`;
}

/** The contents of a `data:` URL as a blob. */
function fileOf(url) {
  const [head, data] = url.split(',');
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: head.slice('data:'.length).split(';')[0] });
}
