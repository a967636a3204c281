// `npm start` and `npm run build` ask first whether this Node and the packages that are here can do it.

const fail = (why) => {
  console.error(why);
  process.exit(1);
};

const { node } = process.versions, [major, minor] = node.split(".").map(Number);
if (major < 22 || major === 22 && minor < 18) {
  fail(`lb.ts needs Node 22.18 or later, and this is Node ${node}: update Node, or run it by deno or bun`);
}
for (const name of process.argv.slice(2)) {
  try {
    require.resolve(name);
  } catch {
    fail(`${name}, which lb.ts needs, is not in node_modules: run npm install`);
  }
}
