import { afterAll, beforeAll, it } from "vitest";
import { develop, expectAccessible, open, recorded, says, shoot } from "./browser";
import { Service } from "./service";

let service: Service;
beforeAll(async () => {
  service = await Service.start();
});
afterAll(() => service.kill());
it("x", async () => {
  const page = await open(service.url, { colorScheme: "light" });
  await page.locator("#develop:enabled").waitFor();
  await shoot(page, "blank");
  await develop(page, "red apple");
  await says(page, "Finished in");
  console.log(JSON.stringify(await recorded(page)));
  await page.waitForTimeout(700);
  await shoot(page, "one");
  for (const p of ["fox", "hot air balloon", "octopus", "sailboat"]) {
    await develop(page, p);
  }
  await page.waitForTimeout(6000);
  await shoot(page, "several");
  await page.emulateMedia({ colorScheme: "dark" });
  await shoot(page, "dark");
  console.log(JSON.stringify(service.log));
  await expectAccessible(page);
});
