// What the scripts of this folder share: what they were told, and the JSON that they print at the end.
import net from 'node:net';

export const told = JSON.parse(process.argv[2] ?? '{}');

const connect = net.Socket.prototype.connect;
net.Socket.prototype.connect = function (...given) {
  const { host } = given.flat()[0] ?? {};
  if (host !== '127.0.0.1') throw new Error(`tests do not talk to ${host}`);
  return connect.apply(this, given);
};

const results = {};

export async function note(name, ask) {
  try {
    results[name] = { value: await ask() };
  } catch (error) {
    const { message, url, responseBody } = error;
    const status = error.status ?? error.statusCode;
    results[name] = { error: { class: error.name, status, message, url, responseBody } };
  }
}

export const print = () => process.stdout.write(JSON.stringify(results));
